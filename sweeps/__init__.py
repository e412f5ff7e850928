"""The task functions of the reference study: ordinary Hydra task functions, to be copied from."""
