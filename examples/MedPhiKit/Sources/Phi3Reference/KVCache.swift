import Phi3Core

/// Keys and values of the tokens of one sequence that were read already.
///
/// LongRoPE rotates a whole sequence with one set of factors, chosen by its length. Keys made with the
/// other set cannot be used again, so a cache belongs to one set.
public struct KVCache: Sendable {
    /// Which of the two parts.
    public enum Part: Sendable {
        /// What is compared with queries, rotated.
        case keys
        /// What is mixed by the comparison.
        case values
    }

    /// Whether its keys are rotated with LongRoPE's long factors.
    public let usesLongFactors: Bool
    /// Tokens read so far.
    public private(set) var count = 0
    /// Tokens there is room for.
    public private(set) var capacity: Int

    let heads: Int
    let headSize: Int
    // Token after token, each with all its heads.
    private(set) var keys: [[Float]]
    private(set) var values: [[Float]]

    /// Growing seldom keeps copies rare.
    private static let growth = 256

    /// An empty cache.
    ///
    /// - Parameters:
    ///   - config: the model's architecture.
    ///   - length: tokens of the whole sequence, which choose LongRoPE's factors.
    public init(_ config: ModelConfig, length: Int) {
        self.init(config, capacity: 0, usesLongFactors: config.usesLongFactors(length: length))
    }

    /// A cache of zeros with room for some tokens, as a package with fixed shapes has it.
    public init(_ config: ModelConfig, capacity: Int, usesLongFactors: Bool) {
        self.usesLongFactors = usesLongFactors
        self.capacity = capacity
        heads = config.keyValueHeadCount
        headSize = config.headSize
        let empty = [Float](repeating: 0, count: capacity * config.keyValueWidth)
        keys = Array(repeating: empty, count: config.layerCount)
        values = keys
    }

    /// Numbers of one token in one layer.
    var width: Int { heads * headSize }

    /// Forgets all but the first tokens.
    public mutating func truncate(to length: Int) {
        count = max(0, min(count, length))
    }

    /// Makes room for tokens and takes them for read.
    mutating func reserve(upTo end: Int) {
        count = max(count, end)
        guard end > capacity else { return }
        let room = (end + KVCache.growth - 1) / KVCache.growth * KVCache.growth
        let more = [Float](repeating: 0, count: (room - capacity) * width)
        for layer in keys.indices {
            keys[layer] += more
            values[layer] += more
        }
        capacity = room
    }

    /// Stores rows of one layer, from a token on.
    mutating func store(
        _ rows: Int, layer: Int, at position: Int, keys newKeys: UnsafePointer<Float>,
        values newValues: UnsafePointer<Float>, stride: Int
    ) {
        for row in 0..<rows {
            let begin = (position + row) * width
            let key = UnsafeBufferPointer(start: newKeys + row * stride, count: width)
            let value = UnsafeBufferPointer(start: newValues + row * stride, count: width)
            keys[layer].replaceSubrange(begin..<begin + width, with: key)
            values[layer].replaceSubrange(begin..<begin + width, with: value)
        }
    }

    /// One head's numbers of one token.
    ///
    /// - Parameters:
    ///   - part: keys or values.
    ///   - layer: a block of the model.
    ///   - head: one of its key and value heads.
    ///   - position: below `capacity`.
    public func row(_ part: Part, layer: Int, head: Int, position: Int) -> ArraySlice<Float> {
        let begin = position * width + head * headSize
        return (part == .keys ? keys : values)[layer][begin..<begin + headSize]
    }

    /// Puts one head's numbers of one token in, e.g. from a state of a package.
    ///
    /// - Parameter row: as many numbers as a head is wide.
    public mutating func setRow(
        _ row: some Collection<Float>, _ part: Part, layer: Int, head: Int, position: Int
    ) {
        let begin = position * width + head * headSize
        for (offset, number) in row.prefix(headSize).enumerated() {
            switch part {
            case .keys: keys[layer][begin + offset] = number
            case .values: values[layer][begin + offset] = number
            }
        }
    }
}
