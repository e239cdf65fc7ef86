"""The tasks, by name."""

from __future__ import annotations

from learning.tasks.digits import FewDigits
from learning.tasks.language import (
    MLP,
    Attention,
    Float32,
    FourBit,
    Language,
    Long,
    MorePasses,
    MoreSteps,
    Slovene,
)
from learning.tasks.newsgroups import MoreNewsgroups, Newsgroups, Retrieval
from learning.tasks.task import Task
from learning.tasks.teachers import DenseTeacher, LowRankTeacher, RotatedTeacher

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Newsgroups,
        MoreNewsgroups,
        Retrieval,
        Language,
        MorePasses,
        Long,
        MoreSteps,
        MLP,
        Attention,
        Slovene,
        FourBit,
        Float32,
        FewDigits,
        RotatedTeacher,
        LowRankTeacher,
        DenseTeacher,
    )
}
