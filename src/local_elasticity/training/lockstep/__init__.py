"""Many networks in one step: stacked weights, and the three routes that advance them."""

from local_elasticity.training.lockstep.routes import ROUTES, Route, RouteName
from local_elasticity.training.lockstep.trial import choose_route, try_replica

__all__ = ["ROUTES", "Route", "RouteName", "choose_route", "try_replica"]
