"""Discovery: a module and an example come in, its structure goes out.

Begin at ``discover.py``: ``trace.py`` runs one forward pass, ``graph.py`` and ``traversal.py`` make its graph and walk it,
``residual.py`` finds streams and branches in it, ``branch_roles.py`` and ``outer_roles.py`` say what parameters are for.
"""

from mlu_lightning.discovery.discover import discover
from mlu_lightning.discovery.structure import Branch, BranchKind, ParameterFacts, Site, Structure, Tap

__all__ = ["Branch", "BranchKind", "ParameterFacts", "Site", "Structure", "Tap", "discover"]
