"""The battery: every case, and which routes may refuse it and why. What is not excused here must be right."""

from functools import partial

import odd_losses as losses
import odd_models as m
from odd_models import CONTRACT, DOUBLE, JVP, TRANSFORMS, VMAP, Case
from torch import nn
from torch.nn.utils import parametrize

NO_RULE = "vmap has no rule for it"
IDLE = "torch.func gives zeros to weights without gradient, which decay would move"
NO_FORWARD_AD = "there is no forward-mode derivative"
MOVES = "the forward or the loss moves a state or draws: one call a source is the only way"
WRITES = "weights or arguments are written, so copies of the weights in one batch cannot stand for them"
DATA_DEPENDENT = "Python looks at values, which no transform shows it"
HOOKED = "a backward hook is no part of the derivative that transforms take"
ADDS = "the loss reads weights or activations by itself: what that adds cannot be contracted"
COMPILED = "its graph is frozen"
HOLDS = "the loss holds the weights themselves, not the model, and a converted copy has others"
NOT_CONTRACTED = "a layer without a rule of contraction"

ORDINARY = [
    Case("linear", m.linear),
    Case("mlp", m.mlp),
    Case("conv1d", m.conv1d, data=m.series),
    Case("conv2d", m.conv2d, data=m.images),
    Case("conv3d", m.conv3d, data=m.volumes),
    Case("transposed conv", m.transposed_conv, data=m.images),
    Case("grouped dilated conv", m.grouped_dilated_conv, data=m.images),
    Case("circular conv", m.circular_conv, data=m.images),
    Case("batch norm in eval", m.batch_norm, data=m.images),
    Case("instance norm with statistics", m.instance_norm, data=m.images),
    Case("group norm", m.group_norm, data=m.images),
    Case("layer norm", m.layer_norm),
    Case("rms norm", m.rms_norm),
    Case(
        "lstm both ways",
        partial(m.Recurrent, nn.LSTM, bidirectional=True),
        data=m.sequences,
        may_refuse=frozenset({VMAP}),
        why=NO_RULE,
    ),
    Case(
        "gru of two layers",
        partial(m.Recurrent, nn.GRU, num_layers=2),
        data=m.sequences,
        may_refuse=frozenset({VMAP}),
        why=NO_RULE,
    ),
    Case("rnn", partial(m.Recurrent, nn.RNN), data=m.sequences, may_refuse=frozenset({VMAP}), why=NO_RULE),
    Case("multihead attention", m.Attending, data=m.sequences),
    Case("transformer layer", partial(m.Encoding, 0.0), data=m.sequences),
    Case("transformer layer with dropout", partial(m.Encoding, 0.1), data=m.sequences),
    Case("embedding", m.Reading, data=m.tokens),
    Case("embedding with padding", partial(m.Reading, padding_idx=0), data=m.tokens),
    Case("tied weights", m.Tied, data=m.tokens),
    Case("shared layer", m.Shared),
    Case("residual in place", m.Residual),
    Case("module lists", m.Blocks, may_refuse=frozenset({VMAP}), why=IDLE),
    Case("frozen layer", m.frozen),
    Case("dropout in eval", m.dropout),
    Case("one output", m.one_output, losses.fixed(nn.BCEWithLogitsLoss), m.yes_or_no),
    Case("bare parameters", m.Bare),
    Case("prelu and bilinear", m.Bilinear),
    Case("slots", m.Slots),
    Case("weights in a plain list", m.Unregistered),
    Case("detached branch", m.Detaching, may_refuse=frozenset({VMAP}), why=IDLE),
    Case("lazy table", m.LazyTable),
    Case("stored activation", m.StoresActivation),
    Case("observing hook", m.observer_hook),
    Case("forward hook", m.forward_hook),
    Case("forward pre hook", m.forward_pre_hook),
    Case("forward replaced on the instance", m.instance_forward),
]

ODD_MODELS = [
    Case("embedding of small norm", partial(m.Reading, max_norm=0.5), data=m.tokens, may_refuse=TRANSFORMS, why=WRITES),
    Case(
        "sparse embedding",
        partial(m.Reading, sparse=True),
        data=m.tokens,
        may_refuse=TRANSFORMS | {"step"},
        why="no rule of vmap, and AdamW takes no sparse gradients",
    ),
    Case(
        "embedding scaled by frequency",
        partial(m.Reading, scale_grad_by_freq=True),
        data=m.tokens,
        may_refuse=TRANSFORMS,
        why=HOOKED,
    ),
    Case("embedding bag", m.embedding_bag, data=m.tokens, may_refuse=TRANSFORMS, why=NO_RULE),
    Case("complex weights", m.Complex, may_refuse=frozenset({VMAP, CONTRACT}), why="real arithmetic"),
    Case("real weights, complex activations", m.Spectrum, may_refuse=frozenset({CONTRACT}), why=NOT_CONTRACTED),
    Case("expanded weight", m.Expanded, must_refuse=True, why="torch.optim cannot step on it"),
    Case("weight norm", m.weight_norm, may_refuse=frozenset({CONTRACT, JVP}), why=NOT_CONTRACTED),
    Case("weight norm by hook", m.old_weight_norm, may_refuse=TRANSFORMS, why=MOVES),
    Case("spectral norm", m.spectral_norm, may_refuse=frozenset({CONTRACT}), why=NOT_CONTRACTED),
    Case("spectral norm by hook", m.old_spectral_norm, may_refuse=TRANSFORMS | {"double"}, why=MOVES),
    Case("orthogonal weight", m.orthogonal, may_refuse=TRANSFORMS, why=NO_RULE),
    Case("pruned weight", m.pruned, may_refuse=TRANSFORMS, why=MOVES),
    Case(
        "weight norm, cached by the user",
        m.weight_norm,
        may_refuse=frozenset({CONTRACT, JVP}),
        why=NOT_CONTRACTED,
        around=parametrize.cached,
    ),
    Case("old autograd function", partial(m.HandWritten, m._HandTanh), may_refuse=TRANSFORMS, why=NO_RULE),
    Case("checkpoint", partial(m.Checkpointed, False), may_refuse=TRANSFORMS, why=NO_RULE),
    Case(
        "reentrant checkpoint",
        partial(m.Checkpointed, True),
        must_refuse=True,
        why="autograd.grad does not see what is inside",
    ),
    Case("outputs that are gradients", m.Energy, may_refuse=TRANSFORMS, why=NO_FORWARD_AD),
    Case("branch on values", m.Branching, may_refuse=TRANSFORMS, why=DATA_DEPENDENT),
    Case("scripted", m.scripted, may_refuse=TRANSFORMS | {DOUBLE}, why=COMPILED, around=m.unoptimised),
    Case("traced", m.traced, may_refuse=TRANSFORMS | {DOUBLE}, why=COMPILED, around=m.unoptimised),
    Case("compiled", m.compiled, may_refuse=TRANSFORMS, why=COMPILED),
    Case("relu in place on the input", m.relu_in_place, may_refuse=TRANSFORMS, why=WRITES),
    Case("scales its input in place", m.ScalesInput, may_refuse=TRANSFORMS, why=WRITES),
    *(
        Case(
            f"buffer moves: {how}{', and counts' if used else ''}",
            partial(m.Averaging, how, used),
            may_refuse=TRANSFORMS,
            why=MOVES,
        )
        for how in ("reassign", "in place", "data")
        for used in (False, True)
    ),
    Case("clamps its weights", m.ClampsWeights, may_refuse=TRANSFORMS, why=WRITES),
    Case("counts its calls", m.Counting, may_refuse=TRANSFORMS, why=MOVES),
    Case("logs its calls", m.Logging, may_refuse=TRANSFORMS, why=MOVES),
    Case("caches a product of weights", m.CachesWeights, may_refuse=TRANSFORMS, why=MOVES),
    *(
        Case(f"own generator of {source}", partial(m.Noisy, source), may_refuse=TRANSFORMS, why=MOVES)
        for source in ("torch", "numpy", "old numpy", "python")
    ),
    *(
        Case(f"global stream of {source}", partial(m.GlobalNoise, source), may_refuse=TRANSFORMS, why=MOVES)
        for source in ("torch", "numpy", "python")
    ),
    Case("counter on the class", m.class_counter, may_refuse=TRANSFORMS, why=MOVES),
    Case("counter in a global", m.GlobalCounter, may_refuse=TRANSFORMS, why=MOVES),
    Case("counter in a closure", m.closure_counter, may_refuse=TRANSFORMS, why=MOVES),
    Case("flags set in the forward", m.SetsFlags, may_refuse=TRANSFORMS, why=MOVES),
    Case("dropout in train mode", m.dropout, may_refuse=TRANSFORMS, why=MOVES, mode="train"),
    Case("backward hook", m.backward_hook, may_refuse=TRANSFORMS, why=HOOKED),
    Case("backward pre hook", m.backward_pre_hook, may_refuse=TRANSFORMS, why=HOOKED),
    Case("gradient turned round", m.ReversesGradient, may_refuse=TRANSFORMS, why=HOOKED),
    Case("straight through", partial(m.HandWritten, m._StraightThrough), may_refuse=TRANSFORMS, why=HOOKED),
    Case("hook on a weight", lambda: m.HookedWeights(stored=False).hook(), may_refuse=TRANSFORMS, why=HOOKED),
    Case("hook on a stored gradient", lambda: m.HookedWeights(stored=True).hook(), must_refuse=True, why=HOOKED),
    Case(
        "batch norm without statistics",
        m.batch_norm_without_statistics,
        data=m.images,
        may_refuse=TRANSFORMS,
        why="samples mix",
    ),
    Case(
        "batch norm in train mode",
        m.batch_norm,
        data=m.images,
        may_refuse=TRANSFORMS,
        why="samples mix",
        mode="train",
    ),
]

ORDINARY_LOSSES = [
    Case("cross entropy module", m.mlp, losses.fixed(nn.CrossEntropyLoss)),
    Case("label smoothing", m.mlp, losses.fixed(partial(nn.CrossEntropyLoss, label_smoothing=0.2))),
    Case("class weights, summed", m.mlp, losses.fixed(losses.weighted_sum)),
    Case("labels ignored", m.mlp, losses.fixed(partial(nn.CrossEntropyLoss, reduction="sum")), m.some_ignored),
    Case("mean by the user", m.mlp, losses.fixed(losses.users_mean)),
    Case("not reduced", m.mlp, losses.fixed(losses.unreduced)),
    Case("log-likelihood", m.mlp, losses.fixed(losses.log_likelihood)),
    Case("hinge", m.mlp, losses.fixed(nn.MultiMarginLoss)),
    Case("focal", m.mlp, losses.fixed(lambda: losses.focal)),
    Case("soft labels", m.mlp, data=m.soft_labels),
    Case("divergence from soft labels", m.mlp, losses.fixed(lambda: losses.divergence), m.soft_labels),
    Case("multi-label", m.mlp, losses.fixed(nn.BCEWithLogitsLoss), m.label_sets),
    Case("squares", m.mlp, losses.fixed(nn.MSELoss), m.real_targets),
    Case("huber", m.mlp, losses.fixed(nn.HuberLoss), m.real_targets),
    Case("gaussian", m.mlp, losses.fixed(lambda: losses.gaussian), m.real_targets, frozenset({VMAP}), DATA_DEPENDENT),
    Case("learned loss", m.mlp, losses.fixed(losses.Learned)),
]

READING = [
    Case(f"{name}, {kind}", model, loss, data, frozenset({VMAP, CONTRACT, *more}), why)
    for name, loss, more, why in (
        ("penalty in a lambda", losses.penalised_lambda, (), ADDS),
        ("penalty in a partial", losses.penalised_partial, (), ADDS),
        ("penalty in a bound method", losses.penalised_method, (), ADDS),
        ("penalty, model in a list", partial(losses.Penalised, hidden=True), (), ADDS),
        ("penalty, model as a submodule", partial(losses.Penalised, hidden=False), (), ADDS),
        ("penalty, list of weights", losses.penalised_list, (DOUBLE,), HOLDS),
        ("penalty, tuple of weights", losses.penalised_tuple, (DOUBLE,), HOLDS),
        ("penalty, weights as a default", losses.penalised_default_argument, (DOUBLE,), HOLDS),
        ("penalty at one label", losses.penalised_at_one_label, (), ADDS),
        ("penalty by the label", losses.penalised_by_label, (), ADDS),
        ("weights alone", losses.weights_alone, (), ADDS),
        ("pull to an anchor", losses.anchored, (), ADDS),
        ("weights as a factor", losses.by_detached_weights, (), ADDS),
        ("row of the last layer", losses.sliced_by_label, (), ADDS),
        ("hook of the loss", losses.with_own_hook, (), ADDS),
    )
    for kind, model, data in (("mlp", m.mlp, m.vectors), ("conv", m.conv2d, m.images))
]

ACTIVATIONS = [
    Case(name, m.StoresActivation, loss, may_refuse=frozenset({VMAP, CONTRACT}), why=ADDS)
    for name, loss in (
        ("activation", losses.with_activation),
        ("activation as a factor", losses.by_detached_activation),
        ("activation at one label", losses.with_activation_at_one_label),
        ("activation at rare inputs", losses.with_activation_at_rare_inputs),
        ("gradient penalty", losses.gradient_penalty),
        ("model again", losses.model_again),
    )
] + [
    Case(
        "activation by a hook",
        m.observer_hook,
        losses.with_hooked_activation,
        may_refuse=frozenset({VMAP, CONTRACT}),
        why=ADDS,
    ),
    Case("model again, lstm", partial(m.Recurrent, nn.LSTM), losses.penalised_lambda, m.sequences, TRANSFORMS, ADDS),
    Case("penalty, complex weights", m.Complex, losses.penalised_lambda, may_refuse=TRANSFORMS, why=ADDS),
    Case("penalty, tied weights", m.Tied, losses.penalised_lambda, m.tokens, frozenset({VMAP, CONTRACT}), ADDS),
    Case("penalty, pruned weight", m.pruned, losses.penalised_lambda, may_refuse=TRANSFORMS, why=ADDS),
]

STATEFUL_LOSSES = [
    Case(name, model, loss, data, TRANSFORMS, MOVES)
    for name, model, loss, data in (
        ("centre loss", m.mlp, losses.fixed(losses.Centre), m.vectors),
        ("centre loss, reassigned", m.mlp, losses.fixed(partial(losses.Centre, in_place=False)), m.vectors),
        ("centre loss, batch norm", m.batch_norm, losses.fixed(losses.Centre), m.images),
        ("counted loss", m.mlp, losses.fixed(losses.Counted), m.vectors),
        ("history in a closure", m.mlp, losses.fixed(losses.closure_list), m.vectors),
        ("nonlocal counter", m.mlp, losses.fixed(losses.nonlocal_counter), m.vectors),
        ("counter on the function", m.mlp, losses.fixed(losses.function_attribute), m.vectors),
        ("memory bank", m.mlp, losses.fixed(losses.MemoryBank), m.vectors),
        ("running level", m.mlp, losses.fixed(losses.Balanced), m.vectors),
        ("label noise, global", m.mlp, losses.fixed(partial(losses.LabelNoise, "torch")), m.vectors),
        ("label noise, numpy", m.mlp, losses.fixed(partial(losses.LabelNoise, "numpy")), m.vectors),
        ("label noise, own generator", m.mlp, losses.fixed(partial(losses.LabelNoise, "own")), m.vectors),
        ("clamps the weights", m.linear, losses.clamps_weights, m.vectors),
        ("average of the model", m.mlp, losses.Teacher, m.vectors),
        ("writes its arguments", m.mlp, losses.fixed(lambda: losses.writes_its_arguments), m.vectors),
        ("branch on the label", m.mlp, losses.fixed(lambda: losses.branches_on_label), m.vectors),
        ("rows by a mask", m.mlp, losses.fixed(lambda: losses.some_rows), m.vectors),
        ("counted calls, counted loss", m.Counting, losses.fixed(losses.Counted), m.vectors),
    )
]

CASES = ORDINARY + ODD_MODELS + ORDINARY_LOSSES + READING + ACTIVATIONS + STATEFUL_LOSSES
