package consul_test

import (
	"testing"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

func TestMain(m *testing.M) {
	at := func(address string) (kv.Store, error) {
		return consul.Open(consul.Config{Client: &api.Config{Address: address}})
	}
	kvtest.Main(m, map[string]kvtest.Job{"lease": kvtest.LeaseJob(at), "presence": kvtest.PresenceJob(at)})
}

func open(tb testing.TB, c consul.Config) *consul.Store {
	tb.Helper()
	s, err := consul.Open(c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}
