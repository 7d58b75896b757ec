package deployments

import (
	"encoding/json"
	"fmt"
	"time"
)

// MaxSnapshot bounds an encoded snapshot, in bytes.
const MaxSnapshot = 16 << 20

// Snapshot is what the store held below desired/ at a time: for nodes that boot while the store is away. The mirror
// that holds the lease writes it, as one signed object.
type Snapshot struct {
	// URL is where it was written: one that was copied elsewhere, as from another stage's mirror, is not what it was
	// signed for.
	URL string `json:"url"`
	// At is the mirror's clock when it wrote it.
	At time.Time `json:"at"`
	// Records are those of desired/, by key, without the store's prefix.
	Records map[string]string `json:"records"`
}

// signedSnapshot is the object: the text that was signed, and its SSH signature.
type signedSnapshot struct {
	Format    int    `json:"format"` // 1
	Snapshot  string `json:"snapshot"`
	Signature string `json:"signature"`
}

// Encode returns the object, with the signature that sign makes.
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
	if err == nil && len(data) > MaxSnapshot {
		err = fmt.Errorf(
			"a snapshot of %d records has %d bytes, at most %d are allowed",
			len(s.Records),
			len(data),
			MaxSnapshot,
		)
	}
	return data, err
}

// ParseSnapshot reads an object. Nothing of the snapshot is looked at before verify has accepted its signature.
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
