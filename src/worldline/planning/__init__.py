"""Search for actions that lead to a goal: `planners` on any cost, `goal` in a world, `oracle` in the true one."""
