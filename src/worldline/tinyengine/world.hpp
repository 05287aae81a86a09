// A world: pictures in row by row, latents, imagined steps, pictures out row by row, and how far to trust them.
#ifndef TINYENGINE_WORLD_HPP
#define TINYENGINE_WORLD_HPP

#include "program.hpp"

namespace tinyengine {

// All memory is the caller's: the program in flash or anywhere, and an arena of the size that the program asks for.
// Latents are `latent_size()` int16, actions `action_size()` int16, normalised and in the latents' unit.
class World {
 public:
  // Check the program and take hold of it. Any later call without this is `wrong_order`.
  Status init(ProgramBytes* program, size_t size_bytes, uint8_t* arena, size_t arena_bytes) {
    ready_ = false;
    const Status status = take(program, size_bytes, arena, arena_bytes);
    if (status != Status::ok) {
      return status;
    }
    program_ = program;
    arena_ = arena;
    header_ = reinterpret_cast<const Header*>(program);
    predictor_ = at<Predictor>(header_->predictor_at);
    gauge_ = at<Gauge>(header_->gauge_at);
    if (header_->encoder_at != 0) {
      const End end = at<Chain>(header_->encoder_at)->end;
      if (end != End::flatten && end != End::average) {  // rows would have nowhere to go
        return Status::bad_program;
      }
      encoder_.bind(program, at<Chain>(header_->encoder_at), arena);
    }
    ready_ = true;
    begun_ = false;
    return Status::ok;
  }

  size_t latent_size() const { return predictor_ != nullptr ? predictor_->latent : 0; }
  size_t action_size() const { return predictor_ != nullptr ? predictor_->action : 0; }
  size_t state_size() const {
    return predictor_ != nullptr ? padded(predictor_->latent, kRowAlign) + padded(predictor_->hidden, kRowAlign) : 0;
  }
  size_t row_bytes() const {
    return ready_ && header_->encoder_at != 0 ? encoder_.first().in_columns * encoder_.first().in_channels : 0;
  }

  size_t picture_rows() const { return ready_ && header_->encoder_at != 0 ? encoder_.first().in_rows : 0; }

  // Take the next row of a picture, `row_bytes()` bytes, as a camera delivers it; the row is not kept. The row behind
  // the last one begins a new picture.
  Status push_row(const uint8_t* row) {
    if (!ready_ || header_->encoder_at == 0) {
      return Status::wrong_order;
    }
    if (row == nullptr) {
      return Status::bad_argument;
    }
    if (encoder_.full()) {
      encoder_.restart();
    }
    int8_t* to = encoder_.next_row();
    const size_t n = row_bytes();
    for (size_t i = 0; i < n; ++i) {
      to[i] = static_cast<int8_t>(row[i] ^ 0x80);
    }
    encoder_.pushed(nullptr, nullptr);
    return Status::ok;
  }

  // Whether a whole picture has come.
  bool seen() const { return ready_ && header_->encoder_at != 0 && encoder_.full(); }

  // The latent of the picture that has come.
  Status latent(int16_t* z) {
    if (!seen()) {
      return Status::wrong_order;
    }
    if (z == nullptr) {
      return Status::bad_argument;
    }
    encoder_.outputs(z);
    if (predictor_ != nullptr && predictor_->radius != 0) {
      normalise(z, predictor_->latent, predictor_->radius);
    }
    return Status::ok;
  }

  // Forget the past and start from a real latent.
  Status begin(const int16_t* z) {
    const Status status = usable(z);
    if (status == Status::ok) {
      for (size_t i = 0; i < state_size(); ++i) {
        state()[i] = 0;
      }
      begun_ = true;
      return observe(z);
    }
    return status;
  }

  // Whether there is a state to go on from.
  bool started() const { return ready_ && begun_; }

  // Put a real latent into the place of the imagined one; the memory of the past stays.
  Status observe(const int16_t* z) {
    const Status status = begun(z);
    for (size_t i = 0; status == Status::ok && i < predictor_->latent; ++i) {
      state()[i] = z[i];
    }
    return status;
  }

  // Bring an action in the world's own units into the form that `step` takes.
  Status action(const float* native, int16_t* out) const {
    const Status status = usable(native);
    if (status != Status::ok || out == nullptr) {
      return status != Status::ok ? status : Status::bad_argument;
    }
    const Normalising* by = at<Normalising>(predictor_->actions_at);
    for (size_t i = 0; i < predictor_->action; ++i) {
      if (__builtin_isnan(native[i])) {
        return Status::bad_argument;
      }
      out[i] = whole(clamp(native[i], by[i].low, by[i].high), by[i]);
    }
    return Status::ok;
  }

  // The way back from the form that `step` takes.
  Status native_action(const int16_t* action, float* native) const {
    const Status status = usable(action);
    if (status != Status::ok || native == nullptr) {
      return status != Status::ok ? status : Status::bad_argument;
    }
    const Normalising* by = at<Normalising>(predictor_->actions_at);
    for (size_t i = 0; i < predictor_->action; ++i) {
      native[i] = clamp(static_cast<float>(action[i]) / by[i].factor + by[i].mean, by[i].low, by[i].high);
    }
    return Status::ok;
  }

  // What every action is clamped to, in the form that `step` takes.
  void action_bounds(int16_t* low, int16_t* high) const {
    const Normalising* by = at<Normalising>(predictor_->actions_at);
    for (size_t i = 0; i < predictor_->action; ++i) {
      low[i] = whole(by[i].low, by[i]);
      high[i] = whole(by[i].high, by[i]);
    }
  }

  // Imagine one step.
  Status step(const int16_t* action) {
    const Status status = begun(action);
    if (status == Status::ok) {
      advance(program_, *predictor_, arena_, action);
    }
    return status;
  }

  // Imagine `steps` steps, one action behind the other; `z` (or null) takes their latents.
  Status rollout(const int16_t* actions, size_t steps, int16_t* z) {
    Status status = begun(actions);
    for (size_t t = 0; status == Status::ok && t < steps; ++t) {
      status = step(actions + t * predictor_->action);
      for (size_t i = 0; z != nullptr && i < predictor_->latent; ++i) {
        *z++ = state()[i];
      }
    }
    return status;
  }

  // The current latent and, behind it, what is remembered: `state_size()` values. To be copied from and to.
  int16_t* state() { return reinterpret_cast<int16_t*>(arena_ + predictor_->state_at); }

  const int16_t* memory() { return state() + padded(predictor_->latent, kRowAlign); }
  size_t memory_size() const { return predictor_ != nullptr ? predictor_->hidden : 0; }

  // Draw the current latent; rows are handed to `emit` as they are made.
  Status decode(Emit emit, void* user) {
    if (!ready_ || !begun_ || header_->decoder_at == 0) {
      return Status::wrong_order;
    }
    if (emit == nullptr) {
      return Status::bad_argument;
    }
    const Drawing& drawing = *at<Drawing>(header_->drawing_at);
    RowStream stream;
    stream.bind(program_, at<Chain>(header_->decoder_at), arena_);
    const size_t row_values = stream.first().in_columns * stream.first().in_channels;
    for (size_t first = 0; !stream.full(); first += row_values) {
      int8_t* row = stream.next_row();
      const size_t stride = padded(drawing.matrix.inputs, kRowAlign) * drawing.matrix.bits / 8;
      const Dense part = {drawing.matrix.inputs, static_cast<uint32_t>(row_values), drawing.matrix.bits,
                          drawing.matrix.weights_at + static_cast<uint32_t>(first * stride),
                          drawing.matrix.by_at + static_cast<uint32_t>(first * sizeof(Channel))};
      each_output(program_, part, state(), [row, &drawing](size_t o, int32_t value) {
        row[o] = static_cast<int8_t>(clamp(value + drawing.zero, drawing.zero, int32_t{127}));
      });
      stream.pushed(emit, user);
    }
    return Status::ok;
  }

  // How far a latent is from the mean of real ones, in 1/256 of the distance that 99 % of these keep within.
  Status region(const int16_t* z, uint32_t* out) {
    return measure(z, reinterpret_cast<const int16_t*>(program_ + gauge_place()), out,
                   [this](uint64_t total) { return static_cast<uint64_t>(root(total)) * 256 / gauge_->radius99; });
  }

  // How far two latents are apart, in 1/256 of the variance of real ones (mean over directions): an imagined one and
  // the observed one, for the error made so far.
  Status drift(const int16_t* imagined, const int16_t* observed, uint32_t* out) {
    return measure(imagined, observed, out,
                   [this](uint64_t total) { return total / (uint64_t{predictor_->latent} << 12); });
  }

 private:
  template <class T>
  const T* at(uint32_t place) const {
    return place != 0 ? reinterpret_cast<const T*>(program_ + place) : nullptr;
  }

  static int16_t whole(float value, const Normalising& by) {
    const float steps = (value - by.mean) * by.factor + 0.5f;
    if (!(steps > -32768.0f)) {
      return -32768;
    }
    if (steps >= 32767.0f) {
      return 32767;
    }
    const int32_t cut = static_cast<int32_t>(steps);
    return static_cast<int16_t>(static_cast<float>(cut) > steps ? cut - 1 : cut);
  }

  uint32_t gauge_place() const { return gauge_ != nullptr ? gauge_->mean_at : 0; }

  Status usable(const void* argument) const {
    if (!ready_ || predictor_ == nullptr) {
      return Status::wrong_order;
    }
    return argument != nullptr ? Status::ok : Status::bad_argument;
  }

  Status begun(const void* argument) const { return ready_ && !begun_ ? Status::wrong_order : usable(argument); }

  template <class Finish>
  Status measure(const int16_t* a, const int16_t* b, uint32_t* out, const Finish& finish) {
    if (!ready_ || gauge_ == nullptr) {
      return Status::wrong_order;
    }
    if (a == nullptr || b == nullptr || out == nullptr) {
      return Status::bad_argument;
    }
    int16_t* const offset = reinterpret_cast<int16_t*>(arena_ + gauge_->offset_at);
    int16_t* const white = reinterpret_cast<int16_t*>(arena_ + gauge_->white_at);
    for (size_t i = 0; i < predictor_->latent; ++i) {
      offset[i] = static_cast<int16_t>(saturate16(a[i] - b[i]));
    }
    each_output(program_, gauge_->whiten, offset,
                [white](size_t o, int32_t value) { white[o] = static_cast<int16_t>(saturate16(value)); });
    const uint64_t score = finish(squares(white, predictor_->latent));
    *out = score > 0xffffffff ? 0xffffffff : static_cast<uint32_t>(score);
    return Status::ok;
  }

  const uint8_t* program_ = nullptr;
  uint8_t* arena_ = nullptr;
  const Header* header_ = nullptr;
  const Predictor* predictor_ = nullptr;
  const Gauge* gauge_ = nullptr;
  RowStream encoder_;
  bool ready_ = false;
  bool begun_ = false;
};

}  // namespace tinyengine

#endif
