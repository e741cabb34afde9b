"""Gradient flows whose S_rel(t) is known: the theory of the first paper (arXiv 2111.01166; spec srel 2)."""

from local_elasticity.flows.base import Flow, Movements, UndefinedWarning
from local_elasticity.flows.diagonal import DiagonalFlow
from local_elasticity.flows.gate import ReLUGateFlow
from local_elasticity.flows.linear import LinearRegressionFlow, RidgeFlow
from local_elasticity.flows.quadratic import QuadraticFlow
from local_elasticity.flows.ridge_classifier import RidgeClassifierFlow
from local_elasticity.flows.softmax import SoftmaxLayerFlow
from local_elasticity.flows.two_layer import TwoLayerNTK

__all__ = [
    "DiagonalFlow",
    "Flow",
    "LinearRegressionFlow",
    "Movements",
    "QuadraticFlow",
    "ReLUGateFlow",
    "RidgeClassifierFlow",
    "RidgeFlow",
    "SoftmaxLayerFlow",
    "TwoLayerNTK",
    "UndefinedWarning",
]
