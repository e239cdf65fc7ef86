"""What the adapters of a model did: `report`, its rows, and the forms in which it is shown."""

from hra_fx.reporting.report import report as report
from hra_fx.reporting.result import Report as Report
from hra_fx.reporting.row import Row as Row
from hra_fx.reporting.skipped_layers import Missed as Missed
