"""The training core: the synthetic street, set losses and matching, the loop, evaluation."""
