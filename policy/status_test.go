package policy

import (
	"encoding/json"
	"testing"
	"time"
)

// kedge explain asks agents of the previous version, too.
func TestStatusOfThePreviousVersion(t *testing.T) {
	t.Parallel()
	want := SourceStatus{Prefix: "pins/prod/web/", From: "store", Since: noon,
		Error: "no leader", ErrorSince: noon.Add(time.Hour)}
	now, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	before := `{"prefix":"pins/prod/web/","from":"store","since":"` + noon.Format(time.RFC3339) +
		`","trouble":"no leader","trouble_since":"` + noon.Add(time.Hour).Format(time.RFC3339) + `"}`
	for _, text := range []string{before, string(now)} {
		var got SourceStatus
		if err := json.Unmarshal([]byte(text), &got); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{`{"action":"run","why":"a pin"}`, `{"action":"run","message":"a pin"}`} {
		var d DecisionStatus
		if err := json.Unmarshal([]byte(text), &d); err != nil || d.Message != "a pin" || d.Action != ActRun {
			t.Errorf("%s: %+v, %v", text, d, err)
		}
	}
}
