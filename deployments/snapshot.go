package deployments

import (
	"encoding/json"
	"fmt"
	"time"
)

// MaxSnapshot bounds an encoded snapshot, in bytes.
const MaxSnapshot = 16 << 20

// Snapshot is a copy of the records in desired/ that Git named, for nodes that boot while the store is away. The
// mirror that holds the lease writes it, as one signed object.
type Snapshot struct {
	// URL is where the snapshot was written. The signature covers it: a snapshot copied to another place, such as
	// another stage's, is refused.
	URL string `json:"url"`
	// At is when the snapshot was written, by the mirror's clock.
	At time.Time `json:"at"`
	// Records are values below desired/, by key without the store's prefix.
	Records map[string]string `json:"records"`
}

// signedSnapshot is the stored object: the signed text and its SSH signature.
type signedSnapshot struct {
	Format    int    `json:"format"` // always 1
	Snapshot  string `json:"snapshot"`
	Signature string `json:"signature"`
}

// Encode returns the object to store, with the signature that sign makes. An object of more than MaxSnapshot bytes is
// an error.
func (s Snapshot) Encode(sign func(text []byte) (signature []byte, err error)) ([]byte, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	signature, err := sign(text)
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(signedSnapshot{1, string(text), string(signature)})
	if err != nil {
		return nil, err
	}
	if len(data) > MaxSnapshot {
		return nil, fmt.Errorf("a snapshot of %d records has %d bytes, at most %d are allowed", len(s.Records), len(data),
			MaxSnapshot)
	}
	return data, nil
}

// ParseSnapshot parses a stored object. It looks at the snapshot only after verify has accepted the signature.
func ParseSnapshot(data []byte, verify func(text, signature []byte) error) (Snapshot, error) {
	var outer signedSnapshot
	var s Snapshot
	if len(data) > MaxSnapshot {
		return s, fmt.Errorf("snapshot: %d bytes, at most %d are allowed", len(data), MaxSnapshot)
	}
	if err := lenientJSON(data, &outer); err != nil {
		return s, fmt.Errorf("snapshot: %w", err)
	}
	if outer.Format != 1 {
		return s, fmt.Errorf("snapshot: it has format %d, this kedge reads format 1", outer.Format)
	}
	if err := verify([]byte(outer.Snapshot), []byte(outer.Signature)); err != nil {
		return s, fmt.Errorf("snapshot: %w", err)
	}
	if err := lenientJSON([]byte(outer.Snapshot), &s); err != nil {
		return Snapshot{}, fmt.Errorf("snapshot: %w", err)
	}
	return s, nil
}
