import numpy


def equation(t, A, params):
    """Decay of the concentration, and production that grows with the logarithm of time."""
    decay = params[0] * A
    growth = numpy.log(numpy.abs(params[2] * t) + 1)
    return decay + params[1] * A * growth
