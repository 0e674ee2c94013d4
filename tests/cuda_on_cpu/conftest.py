"""The emulated extension takes the place of the one that is built, for a whole process: its tests
have a run of their own."""

from .extension import KIND

collect_ignore = [] if KIND else ["emulated"]
