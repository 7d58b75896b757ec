package deployments

import (
	"encoding/json"
	"time"
)

// History is the JSON at history/STAGE/ROLE/UNIT/GENERATION: what a unit was told to run, by whom and when. The
// mirror writes it in the transaction that begins the generation; the newest HistoryKept of each unit stay.
type History struct {
	Generation int64   `json:"generation"`
	Release    Pointer `json:"release"`
	Stable     Pointer `json:"stable,omitzero"`
	// Commit, Author and Subject are the Git commit's that was mirrored then; Committed is its time.
	Commit    string    `json:"commit"`
	Author    string    `json:"author"`
	Subject   string    `json:"subject,omitempty"`
	Committed time.Time `json:"committed"`
	// At is when the mirror wrote it.
	At time.Time `json:"at"`
	// Failed is the digest of the release that the generation rolled back, or of the one that it replaced while a
	// node had that in quarantine: nodes forget this, and a rollback must not go back to it.
	Failed Digest `json:"failed,omitzero"`
	// Claim and Retry are the record's: a release that failed on a node stays out there if the record is lost.
	Claim int64 `json:"claim,omitempty"`
	Retry int64 `json:"retry,omitempty"`
	// Pinned is the record's, while a pin has its place.
	Pinned *Pinned `json:"pinned,omitempty"`
	// Note says what else led to it: a change by hand that was put back, an order, a rollout that was stopped.
	Note string `json:"note,omitempty"`
}

// HistoryKept is how many generations of a unit stay in history/.
const HistoryKept = 50

// ParseHistory reads an entry of history/. Fields that it does not know are passed over.
func ParseHistory(value []byte) (History, error) {
	var h History
	err := lenientJSON(value, &h)
	return h, err
}

// UnmarshalJSON takes the name that the version before gave to Failed, too.
func (h *History) UnmarshalJSON(data []byte) error {
	type plain History
	var both struct {
		plain
		Bad Digest `json:"bad"`
	}
	if err := json.Unmarshal(data, &both); err != nil {
		return err
	}
	*h = History(both.plain)
	if h.Failed.IsZero() {
		h.Failed = both.Bad
	}
	return nil
}
