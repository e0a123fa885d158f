/// A text that fits, and how much was left out of it.
struct Shortened: Sendable, Equatable {
    /// The text.
    var text: String
    /// Turns that a marker line stands for.
    var leftOutTurns = 0
    /// Words left out of turns that by themselves were too long.
    var leftOutWords = 0
}

/// The rule by which a conversation is shortened to a number of tokens; the same as in training.
///
/// Whole turns are left out from the middle: opening and closing turns are kept in alternation, so
/// that each end gets about half of the room, and a line `[… N turns left out …]` stands where the
/// others were. A turn that alone would take more than half of the room loses words from its own
/// middle in the same way. One turn more would not fit.
struct Shortener {
    /// The text's turns or lines; joined with line breaks they are the text.
    let turns: [String]
    /// What the marker line calls one of them.
    let noun: String
    /// How many tokens the text may take.
    let room: Int
    /// Tokens that a text takes in its place, its surroundings included.
    let count: (String) -> Int

    /// The opening and closing turns that are kept.
    private struct Ends {
        var head: Int
        var tail: Int
    }

    /// The longest text the rule allows, or nil when hardly a word of it could stay.
    func shortened() -> Shortened? {
        let whole = turns.joined(separator: "\n")
        if count(whole) <= room { return Shortened(text: whole) }
        let empty = count("")
        func cost(_ text: String) -> Int { count("\n" + text) - empty }
        // Of a long text many lines are alike, empty ones above all.
        var known: [ScalarKey: Int] = [:]
        let costs = turns.map { turn in
            let found = known[ScalarKey(turn)] ?? cost(turn)
            known[ScalarKey(turn)] = found
            return found
        }
        let marker = turns.count > 1 ? cost(leftOut(turns.count, noun)) : 0
        // The first line needs no line break, which each of the costs includes.
        var free = room - empty - marker + cost("")
        while free > 0 {
            let most = turns.count > 1 ? free / 2 : free
            let (ends, spare) = kept(costs.map { min($0, most) }, free, marker)
            let indices = Array(0..<ends.head) + Array((turns.count - ends.tail)..<turns.count)
            let overlong = indices.filter { costs[$0] > most }
            var cuts: [Int: Shortened] = [:]
            for at in overlong {
                // What whole turns leave over goes to those that lose words.
                let words = withoutWords(turns[at], most + spare / overlong.count, cost)
                guard let words else { return nil }
                cuts[at] = words
            }
            let short = joined(ends, cuts)
            let over = count(short.text) - room
            if over <= 0 { return cuts.isEmpty ? grown(ends, costs) : short }
            // Single costs add up to the whole unless tokens join across a line break.
            free -= over
        }
        return nil
    }

    /// How many opening and closing turns fit, and the tokens that stay unused.
    private func kept(_ costs: [Int], _ free: Int, _ marker: Int) -> (Ends, spare: Int) {
        let sum = costs.reduce(0, +)
        if sum <= free + marker { return (Ends(head: costs.count, tail: 0), free + marker - sum) }
        var ends = Ends(head: 0, tail: 0)
        var (usedHead, usedTail) = (0, 0)
        while ends.head + ends.tail < costs.count {
            let (opening, closing) = (costs[ends.head], costs[costs.count - 1 - ends.tail])
            let spare = free - usedHead - usedTail
            // The end that has less so far goes first; the other may take what is left.
            if opening <= spare, usedHead <= usedTail || closing > spare {
                ends.head += 1
                usedHead += opening
            } else if closing <= spare {
                ends.tail += 1
                usedTail += closing
            } else {
                break
            }
        }
        return (ends, free - usedHead - usedTail)
    }

    private func joined(_ ends: Ends, _ cuts: [Int: Shortened]) -> Shortened {
        var texts = turns.enumerated().map { cuts[$0.offset]?.text ?? $0.element }
        let missing = turns.count - ends.head - ends.tail
        if missing > 0 {
            let middle = ends.head..<(turns.count - ends.tail)
            texts.replaceSubrange(middle, with: [leftOut(missing, noun)])
        }
        return Shortened(
            text: texts.joined(separator: "\n"), leftOutTurns: missing,
            leftOutWords: cuts.values.map(\.leftOutWords).reduce(0, +))
    }

    /// The text with each further turn that fits after all: a shorter marker line leaves room.
    private func grown(_ kept: Ends, _ costs: [Int]) -> Shortened {
        var ends = kept
        var short = joined(ends, [:])
        while ends.head + ends.tail < turns.count {
            var more = [
                Ends(head: ends.head + 1, tail: ends.tail),
                Ends(head: ends.head, tail: ends.tail + 1),
            ]
            if costs.prefix(ends.head).reduce(0, +) > costs.suffix(ends.tail).reduce(0, +) {
                more.reverse()
            }
            let longer = more.lazy.map { ($0, joined($0, [:])) }
            guard let next = longer.first(where: { count($0.1.text) <= room }) else { return short }
            (ends, short) = next
        }
        return short
    }

    /// The text without the words of its middle, or nil when fewer than two could stay.
    private func withoutWords(
        _ text: String, _ most: Int, _ cost: (String) -> Int
    ) -> Shortened? {
        let words = PythonText.words(text)
        func keeping(_ kept: Int) -> String {
            let head = (kept + 1) / 2
            let gap = [Array(" \(leftOut(words.count - kept, "word"))".unicodeScalars)]
            let parts = words[..<head] + gap + words[(words.count - kept + head)...]
            return String(scalars: parts.joined().drop(while: PythonText.isSpace))
        }
        var (low, high) = (0, words.count)
        while low < high {
            let middle = (low + high) / 2
            if most < cost(keeping(middle)) { high = middle } else { low = middle + 1 }
        }
        let kept = low - 1
        // A speaker's tag is a word too: one word alone would say nothing.
        guard kept >= 2 else { return nil }
        return Shortened(text: keeping(kept), leftOutWords: words.count - kept)
    }

    private func leftOut(_ number: Int, _ noun: String) -> String {
        "[… \(number) \(noun)\(number == 1 ? "" : "s") left out …]"
    }
}
