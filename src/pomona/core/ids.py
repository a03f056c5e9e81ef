"""Names of things. All are plain strings or integers at run time; the types keep them apart in signatures."""

from typing import NewType

RequestId = NewType("RequestId", str)
TenantId = NewType("TenantId", str)
AdapterId = NewType("AdapterId", str)
"""Digest of an adapter's weights and config (hex). Never a name: two versions under one name have two ids."""
ReplicaId = NewType("ReplicaId", int)
"""Number of a replica: counted up from 0 as replicas start, never given twice."""
BlockId = NewType("BlockId", int)
"""Index of one KV block."""
PageId = NewType("PageId", int)
"""Index of one adapter page: a fixed number of rank rows for every projection of every layer."""
