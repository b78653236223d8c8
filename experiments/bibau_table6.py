"""BI-BAU, Table 6 and Figure 7: what the two constraint sets do, and what the angle does; R-ASR and Q-ASR with each.

    BDJAX_CIFAR10=npz:cifar10.npz python experiments/bibau_table6.py [ATTACK ...]
    BDJAX_CIFAR10=npz:cifar10.npz ANGLES=0,0.2,0.4,0.6,0.8,1 python experiments/bibau_table6.py BadNets

A is the likelihood in the ascent and EWC in the descent, B the prior and the inverse EWC; default BadNets Refool IAD
ISSBA. ANGLES: Figure 7 in place of the table, these values of xi. The environment, the settings and the attacks on what
was purified are those of bibau_table2.py, whose finished rows and victims stand in the same OUT.

To expect (the paper, CIFAR-10, ResNet-18, averages of 4 attacks; ACC, ASR, R-ASR, Q-ASR): Base AT 85.12, 5.32, 65.67,
32.82; + A 87.08, -, 74.62, 41.00; + B 80.82, 3.00, 6.82, 2.85; both 84.16, 1.60, 5.50, 2.07. Figure 7 is a drawing: a
larger xi gives a higher ACC, a smaller one lower ASR, R-ASR and Q-ASR. What came out here, at CPU scale:
experiments/results/bibau_table6.
"""

import os
import sys
from pathlib import Path
from typing import Any

from bdjax.registry import load_file

table2: Any = load_file(Path(__file__).with_name("bibau_table2.py"))

ABLATION = {
    "Base AT": table2.of_bibau(constraints_a=False, constraints_b=False),
    "Base AT + A": table2.of_bibau(constraints_b=False),
    "Base AT + B": table2.of_bibau(constraints_a=False),
    "BI-BAU (U)": table2.of_bibau(),
}
ANGLES = [float(angle) for angle in os.environ.get("ANGLES", "").split(",") if angle]


def main(names: list[str]) -> None:
    """Run the rows of Table 6, or with ANGLES of Figure 7, as bibau_table2.py does."""
    table2.main(names, {f"xi {angle:g}": table2.of_bibau(angle=angle) for angle in ANGLES} or ABLATION)


if __name__ == "__main__":
    main(sys.argv[1:] or ["BadNets", "Refool", "IAD", "ISSBA"])
