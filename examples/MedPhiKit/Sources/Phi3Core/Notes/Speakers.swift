/// Speaker tags: every variant and typo a source uses becomes one canonical name.
///
/// A further voice of the same kind carries a number, as in `Doctor_2`.
public enum Speakers {
    /// The canonical names.
    public static let canonical = [
        "Doctor", "Guest_clinician", "Guest_family", "Interpreter", "Patient", "Speaker",
    ]

    private static let words: [(name: String, words: String)] = [
        ("Doctor", "doctor dr doc physician clinician gp provider d"),
        ("Patient", "patient pt p"),
        (
            "Guest_family",
            "guest_family patient_guest guest family family_member mother mom mum father dad "
                + "parent wife husband spouse partner son daughter brother sister grandmother "
                + "grandfather carer caregiver guardian friend"
        ),
        (
            "Guest_clinician",
            "guest_clinician nurse medical_assistant physician_assistant pharmacist paramedic "
                + "student therapist"
        ),
        ("Interpreter", "interpreter translator"),
        ("Speaker", "speaker spk sp"),
    ]
    private static let byWord: [String: String] = words.reduce(into: [:]) { table, row in
        for word in row.words.split(separator: " ") { table[String(word)] = row.name }
    }
    /// Only long names are matched loosely: of short ones, half of English is a near miss.
    private static let loose = ["doctor", "patient", "guest_family", "guest_clinician"]
    /// "Docotr" scores 5/6 against "Doctor", the farthest of the typos in MTS-Dialog.
    private static let looseCutoff = 0.83

    /// Whether a name is canonical, with or without a number.
    public static func isCanonical(_ speaker: String) -> Bool {
        let scalars = Array(speaker.unicodeScalars)
        func isNamed(_ count: Int) -> Bool {
            canonical.contains { $0.unicodeScalars.elementsEqual(scalars[..<count]) }
        }
        if isNamed(scalars.count) { return true }
        for digits in 1...2 where scalars.count > digits + 1 {
            let number = scalars.suffix(digits)
            guard scalars[scalars.count - digits - 1] == "_",
                let first = number.first, ("1"..."9").contains(first),
                number.dropFirst().allSatisfy({ digitValue($0) != nil })
            else { continue }
            return isNamed(scalars.count - digits - 1)
        }
        return false
    }

    /// The canonical name of a tag, or nil when its words are not a known speaker.
    ///
    /// - Parameter tag: letters, spaces and underscores, then at most two digits.
    static func canonicalSpeaker(_ tag: [Unicode.Scalar]) -> String? {
        var key: [Unicode.Scalar] = []
        for scalar in PythonText.stripped(tag) {
            let isGap = scalar == "_" || PythonText.isSpace(scalar)
            if isGap, key.last == "_" { continue }
            key.append(isGap ? "_" : Unicode.Scalar(lowercase(scalar)))
        }
        var word = key[...]
        var number: Int?
        for scalar in key.suffix(2).reversed() {
            guard let digit = digitValue(scalar) else { break }
            number = digit * (number == nil ? 1 : 10) + (number ?? 0)
            word = word.dropLast()
        }
        if word.last == "_" { word = word.dropLast() }
        let text = String(scalars: word)
        guard let name = byWord[text] ?? closest(to: Array(word)).flatMap({ byWord[$0] }) else {
            return nil
        }
        return number.map { "\(name)_\($0)" } ?? name
    }

    /// Splits "Doctor: Hello" or "[doctor] Hello" into the canonical speaker and the rest; nil for
    /// a line that does not start with a known speaker.
    static func splitTag(_ line: [Unicode.Scalar]) -> (speaker: String, rest: [Unicode.Scalar])? {
        for pattern in [bracketTag, colonTag, dotTag] {
            if let (tag, end) = pattern(line), let speaker = canonicalSpeaker(tag) {
                return (speaker, PythonText.rightStripped(line[end...]))
            }
        }
        return nil
    }

    /// `difflib.get_close_matches(word, loose, n=1, cutoff)`.
    private static func closest(to word: [Unicode.Scalar]) -> String? {
        let scored = loose.map { (ratio(Array($0.unicodeScalars), word), $0) }
        return scored.filter { $0.0 >= looseCutoff }.max { $0 < $1 }?.1
    }

    /// `difflib.SequenceMatcher(None, a, b).ratio()` of short texts.
    static func ratio(_ a: [Unicode.Scalar], _ b: [Unicode.Scalar]) -> Double {
        guard a.count + b.count > 0 else { return 1 }
        return 2 * Double(matching(a[...], b[...])) / Double(a.count + b.count)
    }

    /// How many scalars the longest common block has, with those beside it on either side.
    private static func matching(
        _ a: ArraySlice<Unicode.Scalar>, _ b: ArraySlice<Unicode.Scalar>
    ) -> Int {
        var (bestA, bestB, best) = (a.startIndex, b.startIndex, 0)
        var lengths: [Int: Int] = [:]
        for i in a.indices {
            var longer: [Int: Int] = [:]
            for j in b.indices where a[i] == b[j] {
                let length = (lengths[j - 1] ?? 0) + 1
                longer[j] = length
                if length > best { (bestA, bestB, best) = (i - length + 1, j - length + 1, length) }
            }
            lengths = longer
        }
        if best == 0 { return 0 }
        return best + matching(a[..<bestA], b[..<bestB])
            + matching(a[(bestA + best)...], b[(bestB + best)...])
    }

    private static func lowercase(_ scalar: Unicode.Scalar) -> Unicode.Scalar {
        ("A"..."Z").contains(scalar)
            ? Unicode.Scalar(UInt8(scalar.value + 32)) : scalar
    }
}
