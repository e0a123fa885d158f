import Dispatch

/// Runs an actor's work on one queue of its own: computing for seconds must not keep the threads that
/// all other tasks share.
package final class SerialQueue: SerialExecutor {
    private let queue: DispatchQueue

    /// An executor with a new queue.
    package init(_ label: String) { queue = DispatchQueue(label: label, qos: .userInitiated) }

    package func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        let executor = asUnownedSerialExecutor()
        queue.async { job.runSynchronously(on: executor) }
    }

    package func asUnownedSerialExecutor() -> UnownedSerialExecutor {
        UnownedSerialExecutor(ordinary: self)
    }
}
