from .compare import Tolerance as Tolerance
from .compare import compare_results as compare_results
from .compare import match_results as match_results
from .figures import compare_figures as compare_figures
from .store import published_store as published_store
from .tables import agreement_tables as agreement_tables
from .tables import comparison_tables as comparison_tables
