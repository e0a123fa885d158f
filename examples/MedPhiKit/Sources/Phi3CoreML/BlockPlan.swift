/// One call of a function: which ids it reads, and with which of the two.
///
/// A prompt is read in blocks of the prefill function's width, the last one filled up. Where such a
/// block would reach beyond the cache, and for single ids, the decode function is called: a block
/// writes all its slots, those that only fill it up too.
struct BlockPlan: Equatable, Sendable {
    /// The ids, by their places in the sequence.
    let range: Range<Int>
    /// Whether the prefill function reads them.
    let isWide: Bool

    /// The slot of the first id.
    var position: Int { range.lowerBound }
    /// The row within the call whose logits come back: the last real id's.
    var lastIndex: Int { range.count - 1 }

    /// The calls that read a part of a sequence.
    ///
    /// - Parameters:
    ///   - range: the part; what lies before it was read already.
    ///   - context: slots of the cache.
    ///   - width: ids that one prefill call reads.
    static func blocks(of range: Range<Int>, context: Int, width: Int) -> [BlockPlan] {
        var blocks: [BlockPlan] = []
        var at = range.lowerBound
        while at < range.upperBound {
            let left = range.upperBound - at
            let isWide = left > 1 && context - at >= width
            let end = at + (isWide ? min(left, width) : 1)
            blocks.append(BlockPlan(range: at..<end, isWide: isWide))
            at = end
        }
        return blocks
    }

    /// The row of the rotary tables that belongs to a slot, where a package has LongRoPE's two sets
    /// one after the other.
    static func ropeRow(position: Int, context: Int, usesLongFactors: Bool) -> Int {
        position + (usesLongFactors ? context : 0)
    }

    /// How many ids at the beginning need not be read again; at least one always is, since its
    /// logits are wanted.
    static func reusable(_ read: [Int32], for sequence: [Int32]) -> Int {
        let common = zip(read, sequence).prefix { $0 == $1 }.count
        return max(0, min(common, sequence.count - 1))
    }
}
