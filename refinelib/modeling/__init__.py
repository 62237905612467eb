"""The network, its refinements and losses: pure tensor code, without settings, files or prints."""

#: Classes of a mask's pixels, in the order of the class probabilities.
BACKGROUND, TARGET, NON_TARGET = 0, 1, 2
#: Label of a pixel of which nobody knows the class: it enters no loss and no metric.
IGNORED = 255
