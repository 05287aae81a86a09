"""Search for actions that lead to a goal: `planners` on any cost, `goal` in a world, `oracle` with the true dynamics."""
