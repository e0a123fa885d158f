/// Python's view of text, which the conversations' rules are written in: scalars, and its own white
/// space.
enum PythonText {
    /// `str.isspace` of one scalar: Unicode's White_Space and the four separators U+001C to U+001F.
    static func isSpace(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.value {
        case 0x09...0x0D, 0x1C...0x20, 0x85, 0xA0, 0x1680, 0x2000...0x200A, 0x2028, 0x2029, 0x202F,
            0x205F, 0x3000:
            true
        default:
            false
        }
    }

    /// `str.strip()`.
    static func stripped(_ text: some BidirectionalCollection<Unicode.Scalar>) -> [Unicode.Scalar] {
        rightStripped(text.drop(while: isSpace))
    }

    /// `str.rstrip()`.
    static func rightStripped(
        _ text: some BidirectionalCollection<Unicode.Scalar>
    ) -> [Unicode.Scalar] {
        guard let last = text.lastIndex(where: { !isSpace($0) }) else { return [] }
        return Array(text[...last])
    }

    /// Whether `str.strip()` leaves nothing.
    static func isBlank(_ text: String) -> Bool { text.unicodeScalars.allSatisfy(isSpace) }

    /// `re.findall(r"\s*\S+")`: each word with the white space before it.
    static func words(_ text: String) -> [[Unicode.Scalar]] {
        var words: [[Unicode.Scalar]] = []
        var word: [Unicode.Scalar] = []
        var hasLetters = false
        for scalar in text.unicodeScalars {
            if isSpace(scalar), hasLetters {
                words.append(word)
                word = []
                hasLetters = false
            }
            hasLetters = hasLetters || !isSpace(scalar)
            word.append(scalar)
        }
        return hasLetters ? words + [word] : words
    }

    /// Lines between line feeds, as `str.split("\n")`.
    static func lines(_ text: some Collection<Unicode.Scalar>) -> [[Unicode.Scalar]] {
        text.split(separator: "\n", omittingEmptySubsequences: false).map { Array($0) }
    }
}

extension String {
    /// Text of scalars, none of which is changed or joined with another.
    init(scalars: some Sequence<Unicode.Scalar>) {
        var view = String.UnicodeScalarView()
        view.append(contentsOf: scalars)
        self = String(view)
    }
}
