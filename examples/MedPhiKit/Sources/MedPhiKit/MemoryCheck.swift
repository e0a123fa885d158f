import Foundation

/// Whether a model fits into memory, and the error where it does not.
struct MemoryCheck {
    let plan: MemoryPlan
    let place: URL

    /// Compares what a backend needs with what the system says.
    static func plan(
        _ facts: BackendFacts, place: URL, context: Int,
        available: Int? = SystemMemory.available()
    ) -> MemoryCheck {
        MemoryCheck(
            plan: MemoryPlan(facts.memory, context: context, available: available), place: place)
    }

    /// Throws `Phi3Error.insufficientMemory` where it does not fit.
    func requireFit() throws {
        let advice: String
        switch plan.verdict {
        case .fits: return
        case .reduceContext(let context):
            advice =
                "Load or export it with a context of \(context) tokens, or close other apps."
        case .refuse:
            advice =
                "Export it with fewer bits (mlx_medphi export --bits 4), or take a device "
                + "with more memory."
        }
        let megabyte = 1_000_000
        throw Phi3Error.insufficientMemory(
            ErrorDetails(
                place: place.path,
                found: "\((plan.available ?? 0) / megabyte) MB of free memory",
                expected: "\(plan.needed / megabyte) MB for a context of \(plan.context) tokens, "
                    + "and some to spare",
                advice: advice))
    }
}
