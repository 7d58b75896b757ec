package kv

import (
	"testing"

	"kedge/deployments"
)

// What makes keys and what takes them apart agree.
func TestParseKey(t *testing.T) {
	t.Parallel()
	web := deployments.RoleID{Stage: "prod", Role: "web"}
	app := web.Unit("app")
	for key, want := range map[string]Key{
		DesiredKey(app):                    {Kind: DesiredPrefix, Role: web, Unit: "app"},
		ControlKey(app):                    {Kind: ControlPrefix, Role: web, Unit: "app"},
		PinKey(app):                        {Kind: PinsPrefix, Role: web, Unit: "app"},
		NodePinKey(app, "web-1"):           {Kind: PinsPrefix, Role: web, Unit: "app", Node: "web-1"},
		StatusKey("prod", "web", "web-1"):  {Kind: StatusPrefix, Role: web, Node: "web-1"},
		HistoryKey(app, 12):                {Kind: HistoryPrefix, Role: web, Unit: "app", Generation: 12},
		HistoryPrefixOf(app) + "123456789": {Kind: HistoryPrefix, Role: web, Unit: "app", Generation: 123456789},
	} {
		if got, err := ParseKey(key); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", key, got, err, want)
		}
	}
	for _, key := range []string{
		"", "desired/", "desired/prod/web/", "desired/prod/web", "desired/prod/web/app/x", "desired/prod/../app", "pins/prod/web/app/a/b",
		"pins/prod/web/app/", "status/prod/web/", "status/prod/web/.x", "status/prod/web/a/b", "history/prod/web/app",
		"history/prod/web/app/x", "history/prod/web/app/-1", MirrorKey, MirrorLease, "other/prod/web/app", "prod/web/app",
	} {
		if got, err := ParseKey(key); err == nil || got != (Key{}) {
			t.Errorf("%q parses as %+v, %v", key, got, err)
		}
	}
}
