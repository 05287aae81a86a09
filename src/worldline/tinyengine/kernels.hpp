// One variant of the kernels, chosen when compiling; all give the same bytes.
#ifndef TINYENGINE_KERNELS_HPP
#define TINYENGINE_KERNELS_HPP

#if defined(TINYENGINE_SCALAR)
#include "kernels_scalar.hpp"
#elif defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 1)
#include "kernels_mve.hpp"
#elif defined(__ARM_FEATURE_DSP) && __ARM_FEATURE_DSP
#include "kernels_dsp.hpp"
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "kernels_vnni.hpp"
#else
#include "kernels_scalar.hpp"
#endif

#endif
