"""Second copies of jobs; look-ups by folder and by the scheduler's id; one living job of a user's in a folder."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("duplicates", sa.JSON()))
    op.create_index("ix_jobs_folder", "jobs", ["folder"])
    op.create_index("ix_jobs_scheduler_id", "jobs", ["scheduler_id"])
    living = sa.text("state IN ('SUBMITTING', 'QUEUED', 'HELD', 'RUNNING', 'SUSPENDED')")
    op.create_index(
        "uq_jobs_living", "jobs", ["user_id", "folder"], unique=True, sqlite_where=living, postgresql_where=living
    )


def downgrade() -> None:
    op.drop_index("uq_jobs_living", "jobs")
    op.drop_index("ix_jobs_scheduler_id", "jobs")
    op.drop_index("ix_jobs_folder", "jobs")
    op.drop_column("jobs", "duplicates")
