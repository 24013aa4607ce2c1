"""The engine: one method per command of `gateway.commands`, of the command's name in snake case.

Every method takes the caller's `Principal` and the command, answers with `gateway.resources` and raises `GatewayError`
only. Methods of Stream* and Watch* commands return once the stream is in force: what is wrong from the start is raised
there, and whoever leaves the returned iterator early calls its `aclose`.
"""

from __future__ import annotations

from gateway.commands import StreamEvents
from gateway.engine.builds import BuildService
from gateway.engine.context import Context
from gateway.engine.creation import CreationService
from gateway.engine.environment import EnvironmentService
from gateway.engine.execution import ExecutionService
from gateway.engine.files import FileService
from gateway.engine.forks import ForkService
from gateway.engine.insight import InsightService
from gateway.engine.keys import KeyService
from gateway.engine.logs import LogService
from gateway.engine.pausing import PauseService
from gateway.engine.previews import PreviewService
from gateway.engine.restoring import RestoreService
from gateway.engine.sandboxes import SandboxService
from gateway.engine.snapshots import SnapshotService
from gateway.engine.templates import TemplateService
from gateway.engine.terminals import TerminalService
from gateway.engine.tickets import TicketService
from gateway.events import Backlog
from gateway.resources import Principal


class Engine:
    """All commands in one place; the services behind it do the work."""

    def __init__(self, context: Context) -> None:
        self.context = context

        self.templates = TemplateService(context)
        self.list_templates = self.templates.list
        self.get_template = self.templates.get

        self.builds = BuildService(context, self.templates)
        self.create_template = self.builds.create
        self.delete_template = self.builds.delete
        self.build_template = self.builds.rebuild
        self.list_builds = self.builds.list
        self.get_build = self.builds.get
        self.cancel_build = self.builds.cancel
        self.get_build_log = self.builds.log
        self.stream_build_log = self.builds.stream

        self.sandboxes = SandboxService(context)
        self.list_sandboxes = self.sandboxes.list
        self.get_sandbox = self.sandboxes.get
        self.get_sandbox_by_name = self.sandboxes.get_by_name
        self.update_sandbox = self.sandboxes.update
        self.extend_sandbox = self.sandboxes.extend
        self.destroy_sandbox = self.sandboxes.destroy
        self.wait_ready = self.sandboxes.wait_ready

        self.snapshots = SnapshotService(context)
        self.create_snapshot = self.snapshots.create
        self.list_snapshots = self.snapshots.list
        self.get_snapshot = self.snapshots.get
        self.delete_snapshot = self.snapshots.delete
        self.follow_snapshot = self.snapshots.follow
        self.restore_sandbox = RestoreService(context, self.snapshots).restore

        self.pausing = PauseService(context)
        self.creation = CreationService(context, self.sandboxes, self.templates, self.snapshots, self.pausing)
        self.create_sandbox = self.creation.create
        self.fork_sandbox = ForkService(context, self.creation, self.snapshots).fork

        self.pause_sandbox = self.pausing.pause
        self.resume_sandbox = self.pausing.resume

        insight = InsightService(context)
        self.get_metrics = insight.metrics
        self.get_usage = insight.usage

        execution = ExecutionService(context)
        self.exec = execution.exec
        self.stream_exec = execution.stream_exec
        self.start_process = execution.start_process
        self.list_processes = execution.list_processes
        self.get_process = execution.get_process
        self.signal_process = execution.signal_process
        self.stop_process = execution.stop_process
        self.write_stdin = execution.write_stdin
        self.get_process_output = execution.get_process_output
        self.stream_process_output = execution.stream_process_output

        tickets = TicketService(context)
        self.create_ticket = tickets.create
        terminals = TerminalService(context, tickets)
        self.open_terminal = terminals.open
        self.attach_terminal = terminals.attach
        self.close_terminal = terminals.close

        files = FileService(context)
        self.write_file = files.write_file
        self.write_files = files.write_files
        self.read_file = files.read_file
        self.send_file = files.send_file
        self.receive_file = files.receive_file
        self.stat_path = files.stat_path
        self.list_directory = files.list_directory
        self.get_tree = files.get_tree
        self.make_directory = files.make_directory
        self.rename_path = files.rename_path
        self.copy_path = files.copy_path
        self.change_mode = files.change_mode
        self.remove_path = files.remove_path
        self.watch_path = files.watch_path

        environment = EnvironmentService(context)
        self.list_env = environment.list
        self.set_env = environment.set
        self.delete_env = environment.delete

        logs = LogService(context)
        self.get_logs = logs.get
        self.stream_logs = logs.stream

        previews = PreviewService(context)
        self.create_preview = previews.create
        self.list_previews = previews.list
        self.get_preview = previews.get
        self.update_preview = previews.update
        self.delete_preview = previews.delete
        self.create_share = previews.create_share
        self.list_shares = previews.list_shares
        self.revoke_share = previews.revoke_share

        keys = KeyService(context)
        self.create_api_key = keys.create
        self.list_api_keys = keys.list
        self.revoke_api_key = keys.revoke
        self.key_hash = keys.hash_of

    async def close(self) -> None:
        """End what runs beside the requests. The host goes on with what it has been asked for."""
        await self.builds.close()
        await self.snapshots.close()

    async def stream_events(self, principal: Principal, command: StreamEvents) -> Backlog:
        """The workspace's events after the cursor that have happened; the plane has what comes after them."""
        return await self.context.events.backlog(
            principal.workspace_id,
            after_seq=command.after_seq,
            types=command.types,
            resource_type=command.resource_type,
            resource_id=command.resource_id,
        )
