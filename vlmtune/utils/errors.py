"""Failures that a user can mend. The command line prints them as one line and exits with 1."""


class UserError(Exception):
    """Something the user gave cannot be used; the message says what was found, what was expected, what to do."""


class ConfigError(UserError):
    """A config file or an override is wrong."""


class DataError(UserError):
    """A data file, a row or an image is wrong."""


class ModelError(UserError):
    """A model directory, a family or a tuning request is wrong."""


class TrainingError(UserError):
    """Training cannot go on."""


class CheckpointError(UserError):
    """A checkpoint or an export is missing, broken or foreign."""
