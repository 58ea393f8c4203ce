"""Add two numbers on the cluster: ``verdi run add.py bash@cluster``. The daemon must be running."""

import sys
import time

from aiida import orm
from aiida.engine import submit

builder = orm.load_code(sys.argv[1]).get_builder()
builder.x, builder.y = orm.Int(4), orm.Int(5)
builder.metadata.options.resources = {"num_machines": 1, "num_mpiprocs_per_machine": 1}
node = submit(builder)
print(f"{node.process_label}<{node.pk}> is on its way")
while not node.is_terminated:
    time.sleep(1)
print(f"4 + 5 = {node.outputs.sum.value}" if node.is_finished_ok else f"it failed: verdi process report {node.pk}")
