/// Text as a terminal may be given it. Names, licences, paths and tokens come from files of others,
/// and a terminal obeys the control characters in them.
enum Terminal {
    /// One line: everything that breaks it, moves in it or cannot be seen is written out.
    static func line(_ text: String) -> String { written(text) { isControl($0) || isHidden($0) } }

    /// Lines: breaks and tabs stay, other control characters are written out.
    static func text(_ text: String) -> String {
        written(text) { isControl($0) && $0 != "\n" && $0 != "\t" }
    }

    /// The words of a note: breaks and tabs stay, other control characters are left out.
    static func note(_ text: String) -> String {
        var kept = String.UnicodeScalarView()
        kept.append(
            contentsOf: text.unicodeScalars.filter { !isControl($0) || $0 == "\n" || $0 == "\t" })
        return String(kept)
    }

    /// JSON, in which a control character may be written as a number anywhere it can stand.
    static func json(_ text: String) -> String {
        written(text, as: { "\\u00" + hexadecimal($0) }) { isControl($0) && $0 != "\n" }
    }

    private static func written(
        _ text: String, as form: (Unicode.Scalar) -> String = { "\\u{\(hexadecimal($0))}" },
        _ isWritten: (Unicode.Scalar) -> Bool
    ) -> String {
        guard text.unicodeScalars.contains(where: isWritten) else { return text }
        var shown = String.UnicodeScalarView()
        for scalar in text.unicodeScalars {
            if isWritten(scalar) {
                shown.append(contentsOf: form(scalar).unicodeScalars)
            } else {
                shown.append(scalar)
            }
        }
        return String(shown)
    }

    private static func hexadecimal(_ scalar: Unicode.Scalar) -> String {
        let digits = String(scalar.value, radix: 16)
        return digits.count < 2 ? "0" + digits : digits
    }

    private static func isControl(_ scalar: Unicode.Scalar) -> Bool {
        scalar.value < 0x20 || (0x7F..<0xA0).contains(scalar.value)
    }

    /// Line and paragraph separators, and what turns the direction of text or has no width.
    private static func isHidden(_ scalar: Unicode.Scalar) -> Bool {
        guard scalar.value > 0x7F else { return false }
        switch scalar.properties.generalCategory {
        case .format, .lineSeparator, .paragraphSeparator: return true
        default: return false
        }
    }
}
