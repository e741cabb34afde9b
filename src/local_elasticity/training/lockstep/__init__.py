"""Many networks in one step: stacked weights, and the three routes that advance them."""

from local_elasticity.training.lockstep.routes import ROUTES, Route, RouteName, choose_route, idle_weights

__all__ = ["ROUTES", "Route", "RouteName", "choose_route", "idle_weights"]
