"""Euler–Maruyama of torchsde and of diffrax on the linear SDE of sde.py, run by the Python of their environment.

``python sde.py torchsde|diffrax-tree|diffrax-unsafe REPEATS`` prints CPU seconds and the final moments as JSON.
"""

import json
import sys
import time

import numpy as np

PATHS, STEPS, SAVES, SIGMA, END = 500, 1000, 10, 0.1, 1.0


def alpha(t, exp=np.exp):
    return 3.0 * exp(-t)


def beta(t, exp=np.exp):
    return -1.0 * exp(-2 * t)


def matrices():
    """The two constant matrices of M(t) = alpha M_a + beta M_b of the logits drift, K = 3."""
    u = (np.eye(3) - 1 / 3) / np.sqrt(2 / 3)
    own, other = np.zeros((2, 3, 3, 3, 3))
    for k in range(3):
        for j in range(3):
            (own if k == j else other)[k, :, j] = np.outer(u[j], u[j]) / 3
    return own.reshape(9, 9), other.reshape(9, 9)


def start():
    return np.random.default_rng(0).normal(size=9)


def torchsde_run():
    import torch
    import torchsde

    torch.set_num_threads(1)
    own, other = (torch.from_numpy(m.T.copy()) for m in matrices())
    spread = torch.full((PATHS, 9), SIGMA, dtype=torch.float64)

    class Model:
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t, y):
            return y @ (alpha(t, torch.exp) * own + beta(t, torch.exp) * other)

        def g(self, t, y):
            return spread

    times = torch.linspace(0, END, SAVES + 1, dtype=torch.float64)
    y0 = torch.from_numpy(start()).expand(PATHS, 9)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return torchsde.sdeint(Model(), y0, times, dt=END / STEPS, method="euler")[1:].numpy()

    return run


def diffrax_run(tree):
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    own, other = (jnp.asarray(m) for m in matrices())
    times = jnp.linspace(0, END, SAVES + 1)[1:]
    y0 = jnp.asarray(start())

    def one(key):
        if tree:
            path = diffrax.VirtualBrownianTree(0.0, END, tol=END / STEPS / 2, shape=(9,), key=key)
        else:
            path = diffrax.UnsafeBrownianPath(shape=(9,), key=key)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, a: (alpha(t, jnp.exp) * own + beta(t, jnp.exp) * other) @ y),
            diffrax.ControlTerm(lambda t, y, a: SIGMA * jnp.eye(9), path),
        )
        return diffrax.diffeqsolve(
            terms,
            diffrax.Euler(),
            0.0,
            END,
            END / STEPS,
            y0,
            saveat=diffrax.SaveAt(ts=times),
            max_steps=STEPS + 8,
            adjoint=diffrax.DirectAdjoint() if not tree else diffrax.RecursiveCheckpointAdjoint(),
        ).ys

    batched = jax.jit(jax.vmap(one))

    def run(seed):
        keys = jax.random.split(jax.random.PRNGKey(seed), PATHS)
        return np.asarray(batched(keys).block_until_ready()).transpose(1, 0, 2)

    return run


def main(name, repeats):
    run = torchsde_run() if name == "torchsde" else diffrax_run(name == "diffrax-tree")
    run(0)  # compilation and imports are not counted
    seconds = []
    for seed in range(1, repeats + 1):
        begun = time.process_time()
        y = run(seed)
        seconds.append(time.process_time() - begun)
    print(json.dumps({"seconds": seconds, "mean": y[-1].mean(0).tolist(), "sd": y[-1].std(0).tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
