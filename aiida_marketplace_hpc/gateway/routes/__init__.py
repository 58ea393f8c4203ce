"""What each capability does: one function per row of :data:`aiida_marketplace_hpc.protocol.CAPABILITIES`.

A handler runs in a worker thread, gets a :class:`~aiida_marketplace_hpc.gateway.routes.call.Call` and returns a JSON object
or a :class:`~aiida_marketplace_hpc.gateway.routes.call.Stream`.
"""

from __future__ import annotations

from collections.abc import Callable

from aiida_marketplace_hpc.gateway.routes import files, info, jobs, query
from aiida_marketplace_hpc.gateway.routes.call import Answer, Call

HANDLERS: dict[str, Callable[[Call], Answer]] = {
    "heartbeat": info.heartbeat,
    "getInfo": info.get_info,
    "createOrUpdateCollection": info.create_user,
    "newTransformation": jobs.create,
    "updateTransformation": jobs.launch,
    "getTransformationState": jobs.state,
    "deleteTransformation": jobs.cancel,
    "listJobs": jobs.list_jobs,
    "createDataset": files.upload,
    "getDataset": files.download,
    "deleteDataset": files.delete,
    "listFiles": files.list_files,
    "query": query.query,
}
