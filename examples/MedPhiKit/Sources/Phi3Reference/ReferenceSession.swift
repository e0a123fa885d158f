import Phi3Core

/// A sequence that grows: keeps keys and values between calls and reads only what is new.
///
/// What is common with the sequence before is used again. Where a sequence outgrows LongRoPE's short
/// factors it is read again with the long ones, as transformers does.
public struct ReferenceSession: Sendable {
    /// The model. Keys and values made under one adapter are invalid under another, so a session has
    /// one model for its whole life.
    public let model: ReferenceModel
    /// The ids that were read.
    public private(set) var ids: [Int32] = []
    private var cache: KVCache

    /// Tokens that are read at once, so that a long prompt can be stopped on the way.
    static let blockSize = 256

    /// An empty sequence.
    public init(_ model: ReferenceModel) {
        self.model = model
        cache = KVCache(model.config, length: 1)
    }

    /// Forgets everything that was read.
    public mutating func reset() {
        ids = []
        cache = KVCache(model.config, length: 1)
    }

    /// The logits after a sequence.
    ///
    /// - Parameter sequence: all of its ids, at least one.
    /// - Returns: one number for each id of the vocabulary.
    /// - Throws: `Phi3Error` as `ReferenceModel.read`, or `CancellationError` between two blocks.
    public mutating func logits(after sequence: [Int32]) throws -> [Float] {
        let needsLong = model.config.usesLongFactors(length: sequence.count)
        if needsLong != cache.usesLongFactors {
            cache = KVCache(model.config, length: sequence.count)
            ids = []
        }
        let common = zip(ids, sequence).prefix { $0 == $1 }.count
        var begin = max(0, min(common, sequence.count - 1))
        ids = Array(sequence[..<begin])
        cache.truncate(to: begin)
        var logits: [Float] = []
        repeat {
            try Task.checkCancellation()
            let end = min(begin + ReferenceSession.blockSize, sequence.count)
            let block = Array(sequence[begin..<end])
            let isLast = end == sequence.count
            logits = try model.read(
                block, cache: &cache, output: isLast ? .row(block.count - 1) : .none)
            ids += block
            begin = end
        } while begin < sequence.count
        return logits
    }
}
