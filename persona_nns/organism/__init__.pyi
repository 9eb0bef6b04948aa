from .bundled import ARTIFACTS as ARTIFACTS
from .bundled import ORGANISMS as ORGANISMS
from .bundled import organism_folder as organism_folder
