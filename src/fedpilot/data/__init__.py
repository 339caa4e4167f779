"""Data sets in, one client's examples out.

``load`` reads a table, ``partition`` divides its training rows among clients, ``encode`` turns rows into what a model
takes, once; a client's data set is a ``subset`` of that.
"""

from fedpilot.data.encode import encode
from fedpilot.data.encoded import DataReport, EncodedDataset, few_widths
from fedpilot.data.packaged import PACKAGED
from fedpilot.data.partition import PartitionSettings, client_names, partition, partition_table
from fedpilot.data.sources import load, load_inputs
from fedpilot.data.tables import DataSettings, Rows, Table

__all__ = [
    "PACKAGED",
    "DataReport",
    "DataSettings",
    "EncodedDataset",
    "PartitionSettings",
    "Rows",
    "Table",
    "client_names",
    "encode",
    "few_widths",
    "load",
    "load_inputs",
    "partition",
    "partition_table",
]
