"""What goes wrong without a defect: told in one line, not with a traceback."""


class ConfigError(ValueError):
  """A config, or another input, that cannot be: one line, with the key."""


class RunError(RuntimeError):
  """A run that cannot go on, or cannot be read: one line, with what is left."""


TOLD = (ConfigError, RunError, OSError)
