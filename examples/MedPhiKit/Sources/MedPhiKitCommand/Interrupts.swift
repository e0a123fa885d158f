import Dispatch
import Foundation
import Synchronization

extension MedPhiKitCommand {
    /// Runs the command with what was typed and ends the process. Ctrl-C stops the work and keeps
    /// what was written; a second one ends at once.
    public static func main() async {
        let work = Task { await run(arguments: Array(CommandLine.arguments.dropFirst())) }
        signal(SIGINT, SIG_IGN)
        let interrupts = DispatchSource.makeSignalSource(signal: SIGINT, queue: .global())
        let first = Mutex<ContinuousClock.Instant?>(nil)
        interrupts.setEventHandler {
            // Some send one Ctrl-C to the process and to its group.
            let isSecond = first.withLock { first in
                if let first { return ContinuousClock.now - first > .milliseconds(300) }
                first = .now
                return false
            }
            if isSecond { exit(130) }
            work.cancel()
        }
        interrupts.resume()
        let code = await work.value
        interrupts.cancel()
        exit(code)
    }
}
