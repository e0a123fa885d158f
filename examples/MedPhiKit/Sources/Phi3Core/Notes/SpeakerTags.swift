/// How sources write a speaker's tag before the words.
extension Speakers {
    /// A tag and where the words behind it begin.
    typealias Tag = (tag: [Unicode.Scalar], end: Int)

    /// `[doctor] Hello` and `[doctor]: Hello`.
    static func bracketTag(_ line: [Unicode.Scalar]) -> Tag? {
        let open = skipSpace(line, 0)
        guard open < line.count, line[open] == "[", let end = nameEnd(line, open + 1),
            end < line.count, line[end] == "]"
        else { return nil }
        var at = skipSpace(line, end + 1)
        if at < line.count, line[at] == ":" { at += 1 }
        return (Array(line[(open + 1)..<end]), skipSpace(line, at))
    }

    /// `Doctor: Hello`.
    static func colonTag(_ line: [Unicode.Scalar]) -> Tag? {
        let begin = skipSpace(line, 0)
        guard let end = nameEnd(line, begin) else { return nil }
        let colon = skipSpace(line, end)
        guard colon < line.count, line[colon] == ":" else { return nil }
        return (Array(line[begin..<end]), skipSpace(line, colon + 1))
    }

    /// `Guest_family. Hello`. A dot for the colon is believed only after a tag that cannot be the
    /// last word of a sentence.
    static func dotTag(_ line: [Unicode.Scalar]) -> Tag? {
        let begin = skipSpace(line, 0)
        let first = lettersEnd(line, begin)
        guard first - begin >= 3, first < line.count, line[first] == "_" else { return nil }
        var end = lettersEnd(line, first + 1)
        guard end - first - 1 >= 4 else { return nil }
        let digit = end < line.count && line[end] == "_" ? end + 1 : end
        if digit < line.count, digitValue(line[digit]) != nil { end = digit + 1 }
        guard end < line.count, line[end] == "." else { return nil }
        let words = skipSpace(line, end + 1)
        return words > end + 1 ? (Array(line[begin..<end]), words) : nil
    }

    /// The value of a decimal digit of any script, as Python's `\d` and `int` take it.
    static func digitValue(_ scalar: Unicode.Scalar) -> Int? {
        guard scalar.properties.generalCategory == .decimalNumber else { return nil }
        return scalar.properties.numericValue.map { Int($0) }
    }

    /// The end of a letter, at most 23 letters, spaces and underscores, and at most two digits.
    private static func nameEnd(_ line: [Unicode.Scalar], _ begin: Int) -> Int? {
        guard begin < line.count, isLetter(line[begin]) else { return nil }
        var at = begin + 1
        while at < min(line.count, begin + 24),
            isLetter(line[at]) || line[at] == "_" || line[at] == " "
        {
            at += 1
        }
        for _ in 0..<2 where at < line.count && digitValue(line[at]) != nil { at += 1 }
        return at
    }

    private static func lettersEnd(_ line: [Unicode.Scalar], _ begin: Int) -> Int {
        line[begin...].firstIndex { !isLetter($0) } ?? line.count
    }

    private static func skipSpace(_ line: [Unicode.Scalar], _ begin: Int) -> Int {
        line[begin...].firstIndex { !PythonText.isSpace($0) } ?? line.count
    }

    private static func isLetter(_ scalar: Unicode.Scalar) -> Bool {
        ("a"..."z").contains(scalar) || ("A"..."Z").contains(scalar)
    }
}
