/// Ends a text at the first stop string, and withholds what could still become one.
///
/// The text that comes out is the same however it was cut into pieces on its way in.
public struct StopFilter: Sendable {
    /// A piece of text that is decided.
    public struct Output: Sendable, Equatable {
        /// Text that can be shown; it is not part of a stop string.
        public var text: String
        /// The stop string that ended the text, once one has.
        public var stop: String?

        /// Makes an output.
        public init(text: String, stop: String? = nil) {
            self.text = text
            self.stop = stop
        }
    }

    /// A stop string that may be on its way: how much of it the text ends with.
    private struct Candidate: Sendable {
        let text: String
        let scalars: [Unicode.Scalar]
        /// For each number of matching scalars, how many still match if the next one does not.
        let fallback: [Int]
        var matched = 0

        init(_ text: String) {
            self.text = text
            scalars = Array(text.unicodeScalars)
            var fallback = [0, 0]
            for at in 1..<max(1, scalars.count) {
                var known = fallback[at]
                while known > 0, scalars[at] != scalars[known] { known = fallback[known] }
                fallback.append(scalars[at] == scalars[known] ? known + 1 : 0)
            }
            self.fallback = fallback
        }

        mutating func take(_ scalar: Unicode.Scalar) {
            while matched > 0, scalars[matched] != scalar { matched = fallback[matched] }
            if scalars[matched] == scalar { matched += 1 }
        }

        var isWhole: Bool { matched == scalars.count }
    }

    private var candidates: [Candidate]
    /// The one of which the text ends with the most; that much of it is withheld.
    private var longest = 0
    /// The stop string that ended the text, once one has; nothing comes out after it.
    public private(set) var stop: String?

    /// - Parameter stops: the strings that end a text; compared scalar by scalar.
    /// - Throws: `Phi3Error.option` for an empty one.
    public init(_ stops: [String]) throws(Phi3Error) {
        if stops.contains(where: \.isEmpty) {
            throw Phi3Error.option(
                ErrorDetails(
                    place: "stop strings", found: "an empty one", expected: "one character or more",
                    advice: "Leave it out."))
        }
        candidates = stops.map(Candidate.init)
    }

    /// Takes the next piece of text and gives out what is decided.
    ///
    /// The stop string that is complete first ends the text; of two complete at one place, the
    /// longer.
    public mutating func push(_ piece: String) -> Output {
        var text = String.UnicodeScalarView()
        for scalar in piece.unicodeScalars {
            if stop != nil { break }
            let held = withheld
            var whole: Candidate?
            longest = 0
            for at in candidates.indices {
                candidates[at].take(scalar)
                if candidates[at].matched > candidates[longest].matched { longest = at }
                if candidates[at].isWhole, candidates[at].matched > whole?.matched ?? 0 {
                    whole = candidates[at]
                }
            }
            let decided = held.count + 1 - (whole?.matched ?? withheld.count)
            // One by one: appending a few at a time to a long text takes its length each time.
            for old in held.prefix(decided) { text.append(old) }
            if decided > held.count { text.append(scalar) }
            stop = whole?.text
        }
        return Output(text: String(text), stop: stop)
    }

    /// Gives out what is withheld, at the end of the text.
    public mutating func flush() -> Output {
        var text = String.UnicodeScalarView()
        if stop == nil { text.append(contentsOf: withheld) }
        for at in candidates.indices { candidates[at].matched = 0 }
        return Output(text: String(text), stop: stop)
    }

    private var withheld: ArraySlice<Unicode.Scalar> {
        candidates.isEmpty ? [] : candidates[longest].scalars.prefix(candidates[longest].matched)
    }
}
