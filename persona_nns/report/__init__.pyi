from .page import Written as Written
from .page import write_report as write_report
