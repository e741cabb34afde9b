"""The claims of the image studies, judged and drawn."""


def report(study, runs, size, scale, out, waiting):
    return 0
