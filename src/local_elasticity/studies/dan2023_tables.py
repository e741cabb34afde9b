"""Every definition at every look."""


def tables_of(tasks, records, study, out):
    return []
