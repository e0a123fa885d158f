/// Which keys a query sees: itself and those before it, as far as the sliding window reaches.
enum MaskPlan {
    /// The slots that a query sees.
    ///
    /// - Parameters:
    ///   - query: its slot.
    ///   - window: how many keys it sees, itself included; `nil`: all.
    static func visible(query: Int, window: Int?) -> Range<Int> {
        let end = query + 1
        return max(0, end - (window ?? end))..<end
    }

    /// What has to change in a row of a mask, so that a decode step writes one or two numbers instead
    /// of all.
    ///
    /// - Returns: slots to show and slots to hide, none of them empty.
    static func changes(
        from old: Range<Int>, to new: Range<Int>
    ) -> (shown: [Range<Int>], hidden: [Range<Int>]) {
        (shown: parts(of: new, without: old), hidden: parts(of: old, without: new))
    }

    private static func parts(of range: Range<Int>, without other: Range<Int>) -> [Range<Int>] {
        if !range.overlaps(other) { return range.isEmpty ? [] : [range] }
        var parts: [Range<Int>] = []
        if range.lowerBound < other.lowerBound {
            parts.append(range.lowerBound..<other.lowerBound)
        }
        if other.upperBound < range.upperBound {
            parts.append(other.upperBound..<range.upperBound)
        }
        return parts
    }
}
