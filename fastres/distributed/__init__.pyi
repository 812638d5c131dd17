from .process_group import ProcessGroup as ProcessGroup
from .process_group import join_process_group as join_process_group
from .watchdog import Watchdog as Watchdog
