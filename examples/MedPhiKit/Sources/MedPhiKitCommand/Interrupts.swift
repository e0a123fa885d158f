import Foundation
import Synchronization

extension MedPhiKitCommand {
    /// Runs the command with what was typed and ends the process. Ctrl-C stops the work and keeps
    /// what was written; a second one ends at once.
    public static func main() async {
        let interrupts = Interrupts.catchThem()
        // A closed pipe is told by the write that fails.
        signal(SIGPIPE, SIG_IGN)
        let work = Task { await run(arguments: Array(CommandLine.arguments.dropFirst())) }
        Interrupts.watch(interrupts) { work.cancel() }
        exit(await work.value)
    }
}

/// Where the signal handler, which may call hardly anything, writes a byte.
private let interruptPipe = Atomic<Int32>(-1)

/// Ctrl-C.
enum Interrupts {
    /// From now on each Ctrl-C is a byte in a pipe, so that none is lost before somebody looks.
    ///
    /// - Returns: the end of the pipe to read from; below 0 there is none, and Ctrl-C ends the
    ///   process as it does without us.
    static func catchThem() -> Int32 {
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { return -1 }
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        interruptPipe.store(ends[1], ordering: .sequentiallyConsistent)
        signal(SIGINT) { _ in
            let before = errno
            var byte: UInt8 = 1
            _ = write(interruptPipe.load(ordering: .sequentiallyConsistent), &byte, 1)
            errno = before
        }
        return ends[0]
    }

    /// Calls `stop` at the first Ctrl-C and ends the process at the second.
    static func watch(_ pipe: Int32, stop: @escaping @Sendable () -> Void) {
        guard pipe >= 0 else { return }
        Thread.detachNewThread {
            var first: ContinuousClock.Instant?
            var byte: UInt8 = 0
            while true {
                let count = read(pipe, &byte, 1)
                if count < 0, errno == EINTR { continue }
                guard count == 1 else { return }
                // Some send one Ctrl-C to the process and to its group.
                if let first, ContinuousClock.now - first > .milliseconds(300) { _exit(130) }
                if first == nil { stop() }
                first = first ?? .now
            }
        }
    }
}
