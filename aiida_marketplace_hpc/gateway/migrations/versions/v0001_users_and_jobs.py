"""Users and jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.String(24), primary_key=True),
        sa.Column("issuer", sa.String(255), nullable=False),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("email", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("username", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.UniqueConstraint("issuer", "subject", name="uq_users_identity"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(24), primary_key=True),
        sa.Column("user_id", sa.String(24), sa.ForeignKey("users.id"), nullable=False),
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("script", sa.String(255), nullable=False),
        sa.Column("script_digest", sa.String(80)),
        sa.Column("client_ref", sa.String(255)),
        sa.Column("machine", sa.String(255), nullable=False),
        sa.Column("backend", sa.String(32), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("message", sa.Text()),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.DateTime()),
        sa.Column("intended_at", sa.DateTime()),
        sa.Column("search_first", sa.Boolean(), nullable=False),
        sa.Column("scheduler_id", sa.String(64)),
        sa.Column("scheduler_state", sa.String(64)),
        sa.Column("observed_at", sa.DateTime()),
        sa.Column("reason", sa.Text()),
        sa.Column("name", sa.Text()),
        sa.Column("partition", sa.String(255)),
        sa.Column("account", sa.String(255)),
        sa.Column("nodes", sa.Text()),
        sa.Column("exit_code", sa.Integer()),
        sa.Column("signal", sa.Integer()),
        sa.Column("submitted_at", sa.DateTime()),
        sa.Column("started_at", sa.DateTime()),
        sa.Column("ended_at", sa.DateTime()),
        sa.Column("time_limit", sa.Integer()),
        sa.Column("elapsed", sa.Float()),
        sa.Column("accounting", sa.JSON()),
        sa.UniqueConstraint("user_id", "key", name="uq_jobs_key"),
    )
    op.create_index("ix_jobs_user_state", "jobs", ["user_id", "state"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_index("ix_jobs_user_folder", "jobs", ["user_id", "folder"])


def downgrade() -> None:
    op.drop_table("jobs")
    op.drop_table("users")
