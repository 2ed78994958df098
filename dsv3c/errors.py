"""What a user can get wrong. Every message is one line: ``<where>: expected …, found …; try …``."""


class Dsv3cError(ValueError):
    """Base of all errors that name a user's mistake; the command line prints them without a traceback, exit code 2."""


class ConfigError(Dsv3cError):
    """A config.json or preset that is unknown, inconsistent, or of another architecture."""


class CheckpointError(Dsv3cError):
    """A checkpoint folder whose files are missing, truncated, unsafe or of the wrong shape."""


class CompileError(Dsv3cError):
    """A model, precision or target that cannot be compiled here."""


class ArtifactError(Dsv3cError):
    """An artifact that cannot be written, is damaged, or was made by other sources or versions."""


class TuneError(Dsv3cError):
    """A tuning table, storage or problem that cannot be used."""
