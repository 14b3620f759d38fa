"""Every error that a user can meet; each message says what is wrong, where, and how to fix it.

HarnessError
├── InputError          something the user wrote: a script, an option, a plan, a folder
│   ├── ScriptError     the text to speak or its speakers
│   ├── RequestError    a number in a request: frames, start frame, guidance scale, …
│   └── PlanError       a PLAN.yaml
├── StoreError          a results folder that is foreign, locked or damaged
├── ServerError         Triton could not be started, reached or reloaded
└── InconclusiveError   the data do not support the requested answer
"""


class HarnessError(Exception):
    """Base of all errors that are shown to a user as one message, without a stack trace."""


class InputError(HarnessError):
    """Something the user wrote cannot be used."""


class ScriptError(InputError):
    """A script cannot be spoken."""


class RequestError(InputError):
    """A request asks for something outside the model's limits."""


class PlanError(InputError):
    """A plan file cannot be used."""


class StoreError(HarnessError):
    """A results folder cannot be read or written."""


class ServerError(HarnessError):
    """Triton could not be started, reached or reloaded."""


class InconclusiveError(HarnessError):
    """The data do not support an answer; the message names the measurement that would decide."""
